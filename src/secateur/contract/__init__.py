"""The contract between methods and the framework: asks, clients, replies, reductions and guards."""
