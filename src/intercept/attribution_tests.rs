//! Tests of the reading of control group paths: what is named how, and what a local user may try.

use super::*;
use proptest::prelude::*;

const DOCKER: &str = "4f3c2b1a0d9e8f7a6b5c4d3e2f1a0b9c8d7e6f5a4b3c2d1e0f9a8b7c6d5e4f3a";
const POD: &str = "0f6a3b2c-1d4e-4f5a-8b6c-7d8e9f0a1b2c";

fn users() -> Users {
    Users::parse("root:x:0:0::/root:/bin/sh\nanna:x:1000:1000::/home/anna:/bin/sh\nberta:x:1000:1000::/:/\n77:x:78:1::/:/\n")
}

/// Reads a path in a tree where root owns everything.
fn read(path: &str) -> Owner {
    read_path(path, |_| true, &users())
}

/// Reads a path in a tree where a user owns `delegated` and everything below.
fn read_delegated(path: &str, delegated: &str) -> Owner {
    read_path(path, |directory| directory != delegated && !directory.starts_with(&format!("{delegated}/")), &users())
}

fn unit(name: &str) -> Owner {
    Owner::Unit(name.into())
}

fn user(name: &str) -> Owner {
    Owner::User(name.into())
}

#[test]
fn what_each_place_is() {
    let docker = format!("docker-{DOCKER}.scope");
    let libpod = format!("libpod-{DOCKER}.scope");
    let container = Owner::Container(DOCKER.into());
    let pod = Owner::Pod(POD.into());
    let slice = POD.replace('-', "_");
    for (path, owner) in [
        ("/", Owner::Host),
        ("", Owner::Host),
        ("/init.scope", Owner::Host),
        ("/some-directory", Owner::Host),
        ("/system.slice", Owner::Host),
        ("/system.slice/nginx.service", unit("nginx.service")),
        ("/nginx.service", unit("nginx.service")),
        ("/web.slice/nginx.service", unit("nginx.service")),
        ("/web.slice/web-front.slice/nginx.service", unit("nginx.service")),
        ("/system.slice/system-getty.slice/getty@tty1.service", unit("getty@tty1.service")),
        ("/system.slice/dev\\x2dmqueue.mount", unit("dev\\x2dmqueue.mount")),
        ("/system.slice/_cpu.service", unit("cpu.service")),
        ("/system.slice/a name.service", Owner::Host),
        ("/system.slice/.service", Owner::Host),
        (&format!("/system.slice/{docker}"), container.clone()),
        (&format!("/machine.slice/{libpod}/container"), container.clone()),
        (&format!("/machine.slice/machine-libpod_pod_ab.slice/{libpod}"), container.clone()),
        (&format!("/machine.slice/libpod-conmon-{DOCKER}.scope"), unit(&format!("libpod-conmon-{DOCKER}.scope"))),
        ("/machine.slice/systemd-nspawn@box.service/payload/init.scope", unit("systemd-nspawn@box.service")),
        (&format!("/docker/{DOCKER}"), container.clone()),
        (&format!("/libpod_parent/libpod-{DOCKER}"), container),
        ("/docker/buildx", Owner::Container("buildx".into())),
        ("/docker", Owner::Host),
        ("/lxc.payload.box/system.slice/nginx.service", Owner::Container("box".into())),
        ("/lxc/box", Owner::Container("box".into())),
        (&format!("/kubepods.slice/kubepods-pod{slice}.slice/cri-containerd-{DOCKER}.scope"), pod.clone()),
        (&format!("/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{slice}.slice"), pod.clone()),
        (&format!("/kubepods/burstable/pod{POD}/{DOCKER}"), pod),
        ("/kubepods/burstable", Owner::Host),
        ("/user.slice/user-1000.slice/session-3.scope", user("anna")),
        ("/user.slice/user-1000.slice", user("anna")),
        ("/user.slice/user-1001.slice/session-4.scope", user("1001")),
        ("/user.slice/user-78.slice", user("78")),
        ("/user.slice", user("unknown")),
    ] {
        assert_eq!(read(path), owner, "{path}");
    }
}

#[test]
fn nothing_below_a_users_slice_is_anything_but_the_users() {
    for nested in [
        "user@1000.service/app.slice/nginx.service",
        &format!("user@1000.service/user.slice/docker-{DOCKER}.scope"),
        &format!("session-3.scope/docker-{DOCKER}.scope"),
        "user@1000.service/system.slice/sshd.service",
        &format!("user@1000.service/kubepods.slice/kubepods-pod{}.slice", POD.replace('-', "_")),
        "nginx.service",
        "user-0.slice/session-1.scope",
        "../../system.slice/nginx.service",
    ] {
        let path = format!("/user.slice/user-1000.slice/{nested}");
        assert_eq!(read(&path), user("anna"), "{path}");
        assert_eq!(read_delegated(&path, "/user.slice/user-1000.slice/user@1000.service"), user("anna"), "{path}");
    }
    // Numbers that are not written as systemd writes them, or do not exist, are no user's.
    for odd in
        ["user-01000.slice", "user-+1000.slice", "user-4294967296.slice", "user-.slice", "user-1000.slice.d", "nginx.service"]
    {
        assert_eq!(read(&format!("/user.slice/{odd}/x")), user("unknown"), "{odd}");
    }
    // The user's manager outside of user.slice is still the user's.
    assert_eq!(read("/system.slice/user@1000.service/nginx.service"), user("anna"));
}

#[test]
fn nothing_renames_a_system_unit() {
    let nested_container = format!("/system.slice/foo.service/docker-{DOCKER}.scope");
    for path in ["/system.slice/foo.service/bar.service", "/system.slice/foo.service/user.slice/user-0.slice", &nested_container]
    {
        assert_eq!(read(path), unit("foo.service"), "{path}");
        // A unit that was handed to its user keeps its own name: that one stands in root's directory.
        assert_eq!(read_delegated(path, "/system.slice/foo.service"), unit("foo.service"), "{path}");
    }
}

#[test]
fn names_in_a_directory_that_is_not_roots_count_for_nothing() {
    assert_eq!(read_delegated("/web.slice/nginx.service", "/web.slice"), Owner::Host);
    assert_eq!(read_delegated(&format!("/machine.slice/libpod-{DOCKER}.scope"), "/machine.slice"), Owner::Host);
    assert_eq!(read_delegated(&format!("/kubepods/pod{POD}"), "/kubepods"), Owner::Host);
    assert_eq!(read_delegated(&format!("/docker/{DOCKER}"), "/docker"), Owner::Host);
    assert_eq!(read_delegated("/user.slice/user-0.slice", "/user.slice"), user("unknown"));
    assert_eq!(read_path("/system.slice/nginx.service", |_| false, &users()), Owner::Host);
}

#[test]
fn container_and_pod_names_must_have_their_form() {
    for path in ["/system.slice/docker-nginx.scope", "/system.slice/docker-.scope", "/system.slice/docker-4F3C2B1A0D9E.scope"] {
        assert!(matches!(read(path), Owner::Unit(_)), "{path}");
    }
    assert_eq!(read("/kubepods.slice/kubepods-podnginx.slice/x"), Owner::Host);
    assert_eq!(read("/lxc.payload../x"), Owner::Host);
    assert_eq!(read(&format!("/system.slice/{}.service", "a".repeat(300))), Owner::Host);
}

#[test]
fn users_file() {
    let users = users();
    assert_eq!((users.name(0), users.name(1000), users.name(5)), ("root".into(), "anna".into(), "5".into()));
    let odd = Users::parse("\n::\nx\na:b\n:x:7:\nname with space:x:8:\na/b:x:9:\nok:x:-1:\nok:x:010:\n");
    assert!(odd.0.is_empty(), "{odd:?}");
}

proptest! {
    #[test]
    fn any_path_is_read(path in ".{0,200}", roots in any::<bool>()) {
        read_path(&path, |_| roots, &users());
    }

    #[test]
    fn whatever_a_user_creates_stays_the_users(
        below in prop::collection::vec(
            prop_oneof![
                Just("nginx.service".to_owned()), Just("system.slice".to_owned()), Just("user-0.slice".to_owned()),
                Just(format!("docker-{DOCKER}.scope")), Just("kubepods.slice".to_owned()), "[a-z.@-]{1,20}",
            ],
            0..6,
        )
    ) {
        let path = format!("/user.slice/user-1000.slice/{}", below.join("/"));
        prop_assert_eq!(read(&path), user("anna"));
        let path = format!("/system.slice/foo.service/{}", below.join("/"));
        prop_assert_eq!(read_delegated(&path, "/system.slice/foo.service"), unit("foo.service"));
        let path = format!("/home/{}", below.join("/"));
        prop_assert_eq!(read_delegated(&path, "/home"), Owner::Host);
    }

    #[test]
    fn any_users_file_is_read(text in "[a-z0-9:\n]{0,300}") {
        for name in Users::parse(&text).0.values() {
            prop_assert!(!name.bytes().all(|b| b.is_ascii_digit()));
        }
    }
}
