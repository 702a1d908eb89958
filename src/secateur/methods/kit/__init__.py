"""The parts that several methods share; none of them is a method by itself."""
