//! Tests of the whole file: the documented keys, their effects, and the texts about mistakes.

mod effects;
mod messages;
mod reference;
