//! The configuration file: grammar, raw form, resolved form.
/// stub
pub enum Groups {
    /// stub
    Everyone,
    /// stub
    Only(Vec<Group>),
}
/// stub
pub struct Group {
    /// stub
    pub name: Option<String>,
    /// stub
    pub ips: Vec<std::net::IpAddr>,
    /// stub
    pub uuids: Vec<String>,
}
