"""What does the metal do? The child process that holds torch and one model, and answers rows for its supervisor."""
