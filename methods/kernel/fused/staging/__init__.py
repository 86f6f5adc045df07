"""Inputs that are staged in another order than the output's elements: what a loop reads them through.

Before the loop over a segment, a function fills a buffer with the values for the segment's elements; the loop reads it
as it reads an aligned input. Shapes, blocks and ranks are numbers in the state of the function, so all tensors of a
format share its code.
"""
