"""What several sequences hold once: prefixes, trees of them, and documents read apart."""
