"""What the encoders made, kept on disk under the hash of everything it depends on."""
