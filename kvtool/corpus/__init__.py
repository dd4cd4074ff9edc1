"""Where tokens come from: text, and synthetic probes whose right answer is known. One file per kind."""
