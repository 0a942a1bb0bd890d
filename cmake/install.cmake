# cmake --install: the library, its headers, find_package(iqmpc CONFIG) and pkg-config's file.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(IQMPC_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/iqmpc)
install(TARGETS iqmpc EXPORT iqmpcTargets COMPONENT iqmpc
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
  INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY csrc/include/ ${PROJECT_BINARY_DIR}/include/
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT iqmpc
  FILES_MATCHING PATTERN "*.h" PATTERN "*.hpp"
  PATTERN "cuda_rollout.hpp" EXCLUDE)  # of a library that is not installed
install(EXPORT iqmpcTargets NAMESPACE iqmpc:: DESTINATION ${IQMPC_CMAKE_DIR} COMPONENT iqmpc)

configure_package_config_file(cmake/iqmpcConfig.cmake.in ${PROJECT_BINARY_DIR}/iqmpcConfig.cmake
  INSTALL_DESTINATION ${IQMPC_CMAKE_DIR} NO_SET_AND_CHECK_MACRO)
# Until 1.0 a minor version may change what there is.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/iqmpcConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
configure_file(cmake/iqmpc.pc.in ${PROJECT_BINARY_DIR}/iqmpc.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/iqmpcConfig.cmake ${PROJECT_BINARY_DIR}/iqmpcConfigVersion.cmake
  DESTINATION ${IQMPC_CMAKE_DIR} COMPONENT iqmpc)
install(FILES ${PROJECT_BINARY_DIR}/iqmpc.pc
  DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig COMPONENT iqmpc)
