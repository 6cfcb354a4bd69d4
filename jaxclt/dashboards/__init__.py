"""What features respond to in text: examples, histograms, logit effects."""
