"""Released models: OmniGen-v1, its tokenizer and autoencoder, the latent cache; CLIP and DINO for metrics."""
