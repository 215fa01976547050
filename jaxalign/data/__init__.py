"""Sources of video, clips out of them, batches of clips: `sources.open_source`, then `pipeline.batches`."""
