"""Everything that reads files, saves, prints, plots or parses arguments."""
