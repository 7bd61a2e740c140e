"""Studies: questions asked of the library once, each with its command and its answer kept."""
