//! A vsock listener in the report.

use fence_config::CONNECTED_AUTH;
use fence_control::report::Listener;

use super::inspector::by_name;
use crate::intake::vsock::VsockIntake;

pub(super) fn view(intake: &VsockIntake) -> Listener {
    let (settings, (hears, status)) = (intake.settings(), intake.status());
    Listener {
        kind: "vsock".to_owned(),
        name: settings.name.clone(),
        address: "any".to_owned(),
        port: intake.port(),
        interface: None,
        hash: settings.hash.name().to_owned(),
        auth: CONNECTED_AUTH.name().to_owned(),
        attach: None,
        alone: None,
        hears,
        status,
        interfaces: Vec::new(),
        counters: by_name(intake.counters()),
    }
}
