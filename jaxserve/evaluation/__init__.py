"""What evaluation scripts are made of: measure a model on a mesh, judge it, leave a report.

A script asks one question. It fills a ``result.Result`` with figures (each says how it was measured) and checks, from
the pieces in ``engines``, ``reference``, ``agreement`` and ``clients``, and hands it with its plots to
``command.finish``, which writes and prints it all. ``docs/evaluation.md`` shows the scripts.
"""
