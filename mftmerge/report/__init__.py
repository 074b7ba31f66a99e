"""`mftmerge report`: one HTML page, complete in itself, about the masks and results in a directory. No torch."""
