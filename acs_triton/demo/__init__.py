"""The worked example behind `acs-triton demo`: train, convert, fine-tune, infer sparsely, on real images."""
