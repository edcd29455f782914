"""The compiled CPU core: exact softmax attention for training and decoding, C++ behind ctypes."""
