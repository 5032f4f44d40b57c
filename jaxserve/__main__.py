"""``python -m jaxserve`` is ``jaxserve``."""

from jaxserve.cli import main

if __name__ == "__main__":
    main()
