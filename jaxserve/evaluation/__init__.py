"""What evaluation scripts and ``jaxserve bench`` are made of. A script answers one question: it makes a ``Result`` with
``command.begin``, fills it with figures, checks and tables, and ends with ``command.finish``.

- Results: ``command flags result report plots statistics environment``.
- Engines: ``engines`` (loading, memory, audit), ``predictions`` (of the cost model), ``mesh_runs`` (several meshes),
  ``scaling scaling_runs scaling_report``, ``startup bandwidth``.
- Requests: ``datasets traces`` (what is asked, and when), ``clients serving offline`` (asking), ``latencies`` and
  ``same_tokens`` (what came of it), ``mixed_load timeline lanes`` (who waits for whom), ``sweep``.
- Right numbers: ``reference agreement agreement_report`` (against a plain forward), ``harness lm_eval lm_eval_model
  scorer direct accuracy accuracy_report variants tasks`` (lm-evaluation-harness).
- Where the time goes: ``profile engine_trace``.
"""
