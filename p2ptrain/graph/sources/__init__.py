"""Where models come from: a torch factory, a Hugging Face folder, an ONNX file."""
