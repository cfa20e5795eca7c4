//! What the guides in docs say, typed.
