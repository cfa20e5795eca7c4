//! The fixed message IDs of log lines about requests, for `journalctl MESSAGE_ID=` and `journalctl
//! -x`. dist/fence-daemon.catalog explains each.

/// A domain was fenced or started, or was already as it should be.
const DONE: &str = "4dcaa6fa25f442b1a53d0d2ebcfdb69e";
/// A question was answered.
const TOLD: &str = "38a555b4a4b74cf19911f60b2a367ec1";
/// A request was answered with failure or "permission denied".
const FAILED: &str = "4bb4d4ad147a4066ac9d373e99249970";
/// A request was carried out or refused, and its client did not get the answer.
const UNTOLD: &str = "85b8fb0602e5472db32548b8405fa219";
/// A request was not answered, and nothing was done about it.
const UNANSWERED: &str = "5a714d1747914eba9a02abe162f13857";
/// Guests send requests that are rejected before their digest.
const REJECTED: &str = "287f99ffa31b43529eb73ca8ef788574";

/// The ID of a line from this module, with these fields; `None` for all others.
pub(super) fn of(target: &str, op: Option<&str>, reply: Option<&str>) -> Option<&'static str> {
    let is_of = |rooms: &[&str]| rooms.iter().any(|room| target.contains(room));
    match (op, reply) {
        (Some("off" | "on" | "reboot"), Some("success")) => Some(DONE),
        (Some(_), Some("success" | "off")) => Some(TOLD),
        (Some(_), Some("none" | "undelivered")) => Some(UNTOLD),
        (Some(_), Some(_)) => Some(FAILED),
        // Other rooms name an operation as well, in lines about what goes on afterwards.
        (Some(_), None) => is_of(&["::pipeline", "::intake"]).then_some(UNANSWERED),
        (None, _) => is_of(&["::observe::rejections"]).then_some(REJECTED),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CATALOG: &str = include_str!("../../../dist/fence-daemon.catalog");

    #[test]
    fn each_kind_of_line_has_its_id() {
        let here = super::super::rejections::TARGET;
        for (target, op, reply, expected) in [
            (here, None, None, Some(REJECTED)),
            ("fence_daemon::daemon", None, None, None),
            ("x", Some("off"), Some("success"), Some(DONE)),
            ("x", Some("status"), Some("off"), Some(TOLD)),
            ("x", Some("list"), Some("success"), Some(TOLD)),
            ("x", Some("off"), Some("permission-denied"), Some(FAILED)),
            ("x", Some("off"), Some("none"), Some(UNTOLD)),
            ("fence_daemon::pipeline", Some("reboot"), None, Some(UNANSWERED)),
            ("fence_daemon::hypervisor", Some("reboot"), None, None),
        ] {
            assert_eq!(of(target, op, reply), expected, "{target} {op:?} {reply:?}");
        }
    }

    #[test]
    fn the_catalogue_explains_each_id_and_no_other() {
        let listed: Vec<_> = CATALOG.lines().filter_map(|line| line.strip_prefix("-- ")).collect();
        assert_eq!(listed, [DONE, TOLD, FAILED, UNTOLD, UNANSWERED, REJECTED]);
        // Each variable is a field that the line has.
        let fields = ["FENCE_OP", "FENCE_DOMAIN", "FENCE_SOURCE", "FENCE_REPLY", "FENCE_SEQNO"];
        for variable in CATALOG.split('@').skip(1).step_by(2) {
            assert!(fields.contains(&variable), "{variable}");
        }
    }
}
