"""What `--example NAME` trains: a configuration in the folder NAME, and the pictures it needs."""
