"""The live page of a runs folder: `klab serve`."""
