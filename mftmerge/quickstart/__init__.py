"""`mftmerge quickstart`: the main job, end to end, on a real 135M model without a hub or a data download."""
