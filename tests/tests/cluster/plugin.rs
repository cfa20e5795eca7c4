//! The STONITH plugin of dist.
