"""Training on one's own videos and images: listed, surveyed, cut into clips, encoded, batched.

:mod:`listing` finds files and captions, :mod:`survey` looks through each once, :mod:`plan` cuts
clips and puts them into :mod:`buckets` of one shape, :mod:`encode` keeps what the encoders make of
them, :mod:`clips` gives batches, and :mod:`report` says what became of what. Names of settings are
those of musubi-tuner's dataset files.
"""
