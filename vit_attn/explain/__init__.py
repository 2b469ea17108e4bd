"""Pictures and numbers from a trained model: which tokens it looks at, and how spread out its attention is."""
