//! The tcp listener in the report.

use fence_control::report::Tcp;

use super::inspector::by_name;
use crate::intake::tcp::Intake;

pub(super) fn view(intake: &Intake) -> Tcp {
    let (settings, (hears, status)) = (intake.settings(), intake.status());
    Tcp {
        address: settings.address.to_string(),
        port: settings.port,
        interface: settings.interface.clone(),
        hash: settings.hash.name().to_owned(),
        hears,
        status,
        counters: by_name(intake.counters()),
    }
}

/// What is wrong with it.
pub(super) fn problem(tcp: &Tcp) -> Option<String> {
    (!tcp.hears).then(|| format!("no client can connect by tcp: {}", tcp.status))
}
