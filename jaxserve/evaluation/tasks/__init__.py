"""Tasks for the lm-evaluation-harness that need no download: what is asked, and how an answer is scored.

One YAML file per task, in the harness's own format; ``documents`` makes their cases and ``skills`` the questions of
the demo model. ``--include_path`` of this directory gives them to any model that the harness knows.
"""

from __future__ import annotations

from pathlib import Path

DIRECTORY = Path(__file__).parent
DEMO = ("demo_skills", "demo_choice", "json_validity", "project_text")
"""What is asked where nobody says what: eight skills, a choice among sums, JSON, the likelihood of text."""
