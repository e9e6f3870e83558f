"""ONNX, the graph format of onnxruntime, also in browsers and on phones: write, run, measure."""
