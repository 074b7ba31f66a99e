"""One base model and its masks behind OpenAI's protocol: `mftmerge serve`."""
