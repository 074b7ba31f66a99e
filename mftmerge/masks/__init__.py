"""Weight masks: packed bits, the .mask file, and what can be done with masks. numpy only, no torch."""
