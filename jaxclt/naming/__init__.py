"""What features say of themselves on a prompt: what they write, what they rest on.

`vocabulary` has logits of vectors in the stream, `writes` the tokens that features
raise and lower beyond others, `label` the prompt's tokens that they rest on, and words.
"""
