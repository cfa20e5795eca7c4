//! A tcp listener in the report.

use fence_config::CONNECTED_AUTH;
use fence_control::report::Listener;

use super::inspector::by_name;
use crate::intake::tcp::TcpIntake;

pub(super) fn view(intake: &TcpIntake) -> Listener {
    let (settings, (hears, status), (address, port)) = (intake.settings(), intake.status(), intake.place());
    Listener {
        kind: "tcp".to_owned(),
        name: settings.name.clone(),
        address,
        port,
        interface: settings.interface.clone(),
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
