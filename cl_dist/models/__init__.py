"""The parts of a model: backbones and their sub-blocks, gates, capsules, plugins, heads."""
