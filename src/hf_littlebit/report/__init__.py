"""What is told about a model: its size, its perplexity, its model card, and what is pushed to the Hub."""
