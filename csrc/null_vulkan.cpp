// An empty library under Vulkan's name (its soname is libvulkan.so.1: see CMakeLists.txt). SAPIEN,
// the simulator of ManiSkill2, is linked with Vulkan and does not load on a machine without it,
// although simulation alone calls none of its functions. iqmpc.envs.maniskill loads this one there,
// and only there.
