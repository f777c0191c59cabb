"""Training: a loop over pure steps, and the transformer's task.

:mod:`loop` runs a :class:`~skyreels_jax.training.task.TrainingTask` by the compiled step of
:mod:`step`; :mod:`transformer_task` is that of the transformer. The tasks of the small models'
other parts, and the recipes that name them all, are in :mod:`skyreels_jax.mini`.
"""
