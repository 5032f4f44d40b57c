"""``python -m jaxserve`` is ``jaxserve``."""

from jaxserve.commands import main

if __name__ == "__main__":
    main()
