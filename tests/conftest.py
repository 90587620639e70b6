"Tests run the checkout they lie in, one thread each, in their own folders."
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("IN_TEST", "1")
