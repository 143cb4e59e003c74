"""The edge: who may ask, what a request must look like, and how errors become HTTP."""
