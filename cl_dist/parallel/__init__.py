"""Training on one or many workers: engines, access to parameters under ZeRO, seeds."""
