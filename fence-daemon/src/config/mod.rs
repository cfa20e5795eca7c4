//! The configuration file: grammar, raw form, resolved form.
