//! A reload takes a listener to another interface.

use super::Listening;

impl Listening {
    /// Listens on the interface of this name from the next look on. The end of the old one is no
    /// news.
    pub fn want(&mut self, name: Option<String>) {
        if let Some(old) = std::mem::replace(&mut self.name, name) {
            self.told.remove(&old);
        }
    }
}
