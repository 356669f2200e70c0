"""Operators of onnxsmith's own for ONNX Runtime, in C++, and the program that compiles them."""
