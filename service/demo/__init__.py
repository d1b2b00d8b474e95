"""The demo's drawn world: pictures, clips, captions and questions made from seeds, no download needed."""
