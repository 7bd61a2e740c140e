"""What is learned: a module for each kind of data, from end to end."""
