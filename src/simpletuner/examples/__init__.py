"""Examples for `--example NAME`: a configuration in the folder NAME, and code that draws its training images."""
