"""The LlamaGen family (FoundationVision/LlamaGen): class- and text-conditional Llamas over a grid of VQ codes."""
