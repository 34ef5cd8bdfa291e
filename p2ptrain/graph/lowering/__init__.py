"""One rule per operator that only onnxruntime-training knows: the same thing in standard ONNX."""
