"""Training on one or many workers: engines, parameter reads and edits that know ZeRO, seeds."""
